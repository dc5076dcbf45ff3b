"""The only client of MLflow: versions, aliases, lineage."""
