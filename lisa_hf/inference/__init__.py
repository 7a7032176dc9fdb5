"""Ask a model about images: conversations, files for labeling tools, the web demo."""
