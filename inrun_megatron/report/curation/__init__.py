"""`inrun curate`: which documents to keep, how to weigh the datasets, and the files of the next run."""
