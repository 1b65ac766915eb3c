"""A run's values on their way into its ledger: ranks that agree, the commits of all writers, the ledger of an own loop."""
