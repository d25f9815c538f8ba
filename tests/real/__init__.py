"""Tests with real clients and a real registry, on loopback only."""
