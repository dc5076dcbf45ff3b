"""A registered model that scores records: from files, over HTTP, in MLflow."""
