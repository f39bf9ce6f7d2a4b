"""The page at `/` of the embedded server, for people: photos in, clips out."""
