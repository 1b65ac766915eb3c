"""Values added up and ranked: by sample, document, dataset or field, by phase; and what stands out among them."""
