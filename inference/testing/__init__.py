"""Fakes that ship: a queue in memory, for tests of what uses one."""
