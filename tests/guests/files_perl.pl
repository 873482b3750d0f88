#!/usr/bin/perl
# Proves: perl's files (print, seek, rename, unlink, opendir, truncate) agree with memory.
use strict;
use warnings;
use IO::Handle;

if ($ENV{GUEST_LOG}) {
    open(my $log, '>>', $ENV{GUEST_LOG}) or die;
    print $log "begin\n";
    close $log;
}
my $rounds = ($ENV{GUEST_SECONDS} || 2) * 100;
open(my $out, '>', 'out.txt') or die;
open(my $table, '+>', 'table.txt') or die;
my @want = map { 0 } 1 .. 200;
printf $table "%09d\n", 0 for @want;
for my $round (0 .. $rounds - 1) {
    for my $k (0 .. 9) {
        my $at = ($round * 7919 + $k * 31) % 200;
        seek($table, $at * 10, 0) or die;
        read($table, my $is, 9) == 9 or die;
        die "round $round: $is" if $is != $want[$at];
        $want[$at] += $round;
        seek($table, $at * 10, 0) or die;
        printf $table "%09d", $want[$at];
        print $out "$round.$k $want[$at]\n";
    }
    open(my $new, '>', 'state.new') or die;
    print $new "round $round\n";
    close $new or die;
    if ($round) {
        open(my $old, '<', 'state') or die;
        die 'state' if <$old> ne 'round ' . ($round - 1) . "\n";
        close $old;
    }
    rename('state.new', 'state') or die;
    open(my $made, '>', "made.$round") or die;
    close $made;
    unlink('made.' . ($round - 3)) == 1 or die if $round >= 3;
    select(undef, undef, undef, 0.01);
}
close $out or die;
close $table or die;
print "perl files ok\n";
exit 73;
