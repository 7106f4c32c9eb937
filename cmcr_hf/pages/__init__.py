"""HTML pages in one file: the report of a connection, and what pages share."""
