"""One verb, one file: parse, call one function, print. No logic."""
