"""The operators, one folder each: public function, reference, native CPU path, Triton path, step."""
