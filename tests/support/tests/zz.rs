#[test] fn zz_a(){panic!()}
#[test] fn zz_b(){}
