"""Faults in the machine underneath: killed processes, failing system calls."""
