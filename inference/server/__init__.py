"""The embedded queue: the documented worker API over a database and a folder, for trials, development and tests."""
