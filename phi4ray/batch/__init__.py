"""The batch job: plan, shards, parts, manifest."""
