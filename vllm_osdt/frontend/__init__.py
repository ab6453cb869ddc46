"""The API server's process: requests are checked, named and resolved; metrics are exported."""
