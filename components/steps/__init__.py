"""The steps of the pipeline: each a KFP component whose body imports our packages and calls one stage."""
