# An interval timer whose handler runs between operations, and sleeps that it interrupts.
use Time::HiRes qw(setitimer ITIMER_REAL sleep); my $t=0; $SIG{ALRM}=sub{$t++}; setitimer(ITIMER_REAL,0.005,0.005);
my %h; my $s=1; for my $i (1..3000000){ $s=($s*1103515245+12345)%2147483648; $h{$s%1009}=substr(($h{$s%1009}//'').chr(97+$s%26),-40); if($i%300000==0){ my $l=join '',map{$h{$_}}sort keys %h; $l=~s/([a-f]+)(.)/$2$1/g; print "$i ",unpack('%32C*',$l)," ",length $l,"\n"; select(undef,undef,undef,0.02);} } setitimer(ITIMER_REAL,0); print $t>5?"ok\n":"few\n";
