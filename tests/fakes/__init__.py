"""Servers and clients on loopback for black-box tests: real sockets, scripted behaviour, complete records."""
