"""The job file: schema, loading with overrides, identity, and the plan it becomes on a cluster."""
