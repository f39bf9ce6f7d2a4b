"""The embedded queue: the documented worker API over a store and a folder, for trying, developing and testing."""
