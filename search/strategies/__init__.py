"""Ways to find an allocation, one file each. All meet `search.strategies.base.Strategy`."""
