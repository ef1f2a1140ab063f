"""What `otpo quantize` consists of: its options, the documents, the measurements before and after, the report."""
