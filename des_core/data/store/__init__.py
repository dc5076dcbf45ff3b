"""Records -> feature store: ordered parts, their manifests, statistics and splits."""
