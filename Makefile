.PHONY: demo test
demo:            ## quantize a real model and print what it cost
	bash scripts/demo.sh
test:            ## lint, types and tests
	bash scripts/test.sh
