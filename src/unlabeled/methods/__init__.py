"""One file per paper; no method imports another."""
