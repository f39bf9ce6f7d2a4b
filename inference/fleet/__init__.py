"""Containers that exist only while there is work: how many to lease for, the tick that does, what a warm one takes."""
