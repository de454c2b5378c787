"""Models of no single domain: deep sequence models of the core layers."""
