"""Block by block: collect, choose, correct and round, learn."""
