"""The pipelines of the core's own tasks: those of models that belong to no one domain."""
