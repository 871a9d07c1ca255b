"""Times a model beside its rivals, and tells where its time and memory go."""
