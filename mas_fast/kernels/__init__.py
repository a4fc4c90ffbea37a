"""The ops of mas_fast: `ops` declares them and is the only file that knows which implementation runs where."""
