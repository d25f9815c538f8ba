"""Hypothesis here: nothing on disk, and no deadline for one example, since the machine may be busy."""

from hypothesis import settings

settings.register_profile("pullcache", database=None, deadline=None)
settings.load_profile("pullcache")
