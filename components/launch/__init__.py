"""Workers of a role as local processes, or as the pods of one cluster job, until they are done."""
