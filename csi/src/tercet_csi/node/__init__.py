"""CSI Node: attach, format, mount. Needs no API server and imports no client of one."""
