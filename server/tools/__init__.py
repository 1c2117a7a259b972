"""The verbs, one file each: plain functions of a lab, which MCP (server/app.py) and the command line both call."""
