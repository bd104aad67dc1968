//! What a client of the trace asks for: any line is refused or means what it means when it is written anew.
#![no_main]

use libfuzzer_sys::fuzz_target;
use viommu_trace::Choice;

fuzz_target!(|line: &[u8]| {
    if let Ok(choice) = Choice::parse(line) {
        let again = Choice::parse(choice.line().trim_end().as_bytes());
        assert_eq!(again.as_ref(), Ok(&choice));
        let _ = choice.filter();
    }
});
