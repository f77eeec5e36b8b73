"""One module for each trace format; `protocol` says what a module offers, and `load_trace` picks one."""
