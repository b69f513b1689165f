"""The application: build a supernet, search an allocation, evaluate and export the pruned model."""
