"""Registries as pullcache sees them: one object an upstream, which owns everything that is said to it."""
