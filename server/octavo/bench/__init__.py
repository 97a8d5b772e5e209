"""`octavo bench`: public workloads, offline or as an open-loop load, beside the limit."""
