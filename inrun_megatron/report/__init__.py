"""From the ledger to answers. Knows nothing of torch.

A line imports from those above it, and from no others; `pytest tests/test_packages.py` holds the code to this order.

phases.py       ranges of training steps
text.py         text from the data as it may stand on a line
tables.py       how figures look on a terminal
sql.py          the SELECTs, which DuckDB and Spark both run
query.py        a DuckDB session on one ledger, and the relations that all queries build on
overview.py     a run as a whole: what was trained, its steps, losses and audits
documents/      the documents behind samples: their text, and what they have of the samples' values
values/         values added up and ranked: by sample, document, dataset or field, by phase
charts/         figures as Vega-Lite specs
page/           `inrun report`
summary/        `inrun summary`
comparison/     `inrun compare`
curation/       `inrun curate`

What `inrun top`, `show` and `export` print is made of documents/ and values/ in their own files of commands/.
"""
