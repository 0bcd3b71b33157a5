"""Conformance: does a method keep the contract, and what does it consist of?"""
