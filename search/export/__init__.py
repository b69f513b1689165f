"""The pruned model in formats that other tools load."""
