"""Pulls: manifests, blobs and lists, from what is held or from their upstreams."""
