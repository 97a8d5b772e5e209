"""One real Kubernetes node on the machine at hand, every binary of it built from Go modules.

Standard library only: it runs before anything is installed. `python3 -m e2e.cluster --help`.
"""
