"""The cluster side of vmmesh-agent: hands the bootstrap bundle to machines that may have it."""
