"""Ray: the batch executor and the clusters it runs on. The only importer of Ray."""
