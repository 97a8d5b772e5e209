"""Octavo's Kubernetes operator: plans are pure, one file reads events, one file writes."""
