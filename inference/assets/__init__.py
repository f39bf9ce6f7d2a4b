"""Files that ship with the package: `sample.jpg`, a landscape painted by tests/support/make_sample_photo.py."""
