"""Files that ship with the package: `sample.jpg`, a landscape painted by tests/make_sample_photo.py."""
