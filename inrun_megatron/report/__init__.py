"""From the ledger to answers. Knows nothing of torch.

A line imports from those above it, and from no others; `pytest tests/test_packages.py` holds the code to this order.

phases.py, sql.py, tables.py    ranges of steps; the SQL that DuckDB and Spark run; how figures look on a terminal
query.py                        a DuckDB session on one ledger, and the relations that all queries build on
overview.py                     what was trained, in words; how its losses went
documents/                      the documents behind samples: their text, and what they have of the samples' values
values/                         values added up and ranked: by sample, document, dataset or field, by phase
charts/                         figures as Vega-Lite specs
page/                           `inrun report`
summary/                        `inrun summary`
comparison/                     `inrun compare`
curation/                       `inrun curate`

What `inrun top`, `show` and `export` print is made of documents/ and values/ in their own files of commands/.
"""
