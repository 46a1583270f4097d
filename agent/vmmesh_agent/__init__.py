"""vmmesh-agent: puts a virtual machine into an Istio mesh and keeps it there."""

__version__ = "0.1.0"
