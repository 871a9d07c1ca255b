"""Equipment of the tests: strategies, laws, models, ways to run commands."""
